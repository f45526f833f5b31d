"""The library's interfaces to models, and generation with text models."""
