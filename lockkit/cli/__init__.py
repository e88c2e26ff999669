"""The command line: `lockkit COMMAND ...`.

One file a command, holding arguments and printing only; what a command does lives in the
package of the same name. Heavy libraries are imported inside the commands, so that `--help`
answers at once.
"""
