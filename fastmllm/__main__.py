"""Run the command line: python -m fastmllm."""

from fastmllm.cli import main

main()
