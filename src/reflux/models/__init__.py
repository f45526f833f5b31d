"""Models as the library sees them, and how text models generate."""
