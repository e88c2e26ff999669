"""`python -m lockkit`, the same as `lockkit`."""

from lockkit.cli.app import main

if __name__ == "__main__":
    main()
