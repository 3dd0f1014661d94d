"""``python -m bnsharp.cli``."""

from bnsharp.cli import main

if __name__ == "__main__":
    main()
