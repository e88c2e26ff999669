"""The command line: `lockkit COMMAND ...`.

Each command has one file: a plain function that takes the arguments and prints the result. The work itself is in the
package of the same name. Options come from the config classes (options.py); app.py has the table of commands.
Heavy libraries are imported inside the functions, to keep `--help` fast.
"""
