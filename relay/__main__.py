"""The `relay` command, and `python -m relay`."""

from relay.collector import look_rarely

look_rarely()  # before all that the command imports


def main() -> None:
    """Run the command."""
    from relay.cli import main

    main()


if __name__ == "__main__":
    main()
