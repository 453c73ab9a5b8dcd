"""The sub-commands of `megashear`: each adds its parser, and calls the library and prints."""
