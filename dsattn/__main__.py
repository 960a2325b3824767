"""``python -m dsattn``."""

from dsattn.cli.app import main

if __name__ == "__main__":
    main()
