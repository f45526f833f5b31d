"""The command line: it prints results; other packages compute them."""
