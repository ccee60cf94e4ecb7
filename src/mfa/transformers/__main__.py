"""`python -m mfa.transformers ...`: the command line of transformers, where `--attn-implementation mfa` is known."""

from transformers.cli import transformers as command_line

from . import register
from ._serving import accept_in_server

if __name__ == "__main__":
    register()
    accept_in_server()
    command_line.main()
