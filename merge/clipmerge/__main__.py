"""`python -m clipmerge` and `torchrun -m clipmerge`: the command, by another door."""

from importlib import import_module

if __name__ == "__main__":
    raise SystemExit(import_module("clipmerge_cli").main())
