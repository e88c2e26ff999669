"""The command line: `lockkit COMMAND ...`.

One file per command: a plain function with its arguments, and the printing of its result. What a command does lives
in the package of the same name. Options come from the config classes (options.py); app.py has the table of commands.
Heavy libraries are imported inside the functions, so that `--help` answers at once.
"""
