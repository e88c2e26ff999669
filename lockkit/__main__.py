"""`python -m lockkit` runs the `lockkit` program."""

from lockkit.cli.app import main

if __name__ == "__main__":
    main()
