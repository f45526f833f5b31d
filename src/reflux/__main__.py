"""`python -m reflux` is the command `reflux`, for programs such as torchrun that start a module."""

from reflux.cli.main import main

if __name__ == "__main__":
    main()
