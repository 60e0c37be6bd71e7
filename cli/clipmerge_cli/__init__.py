"""The `clipmerge` command. Nothing is imported here: an interruption while it starts is no traceback."""


def main() -> int:
    """Run the command, by either door; returns its exit code."""
    try:
        from clipmerge_cli.app import main as run

        return run()
    except KeyboardInterrupt:
        import sys

        print("interrupted", file=sys.stderr)
        return 130
