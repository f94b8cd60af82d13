"""Lists our export in optimum: `optimum-cli export compress MODEL OUTPUT`.

The wheel installs this file as optimum/commands/register/register_compress.py. optimum-cli imports it at every start,
so it imports nothing heavy, and it must not fail: an exception here would break every optimum command.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class CompressExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="compress", help="Export a hybrid SSM-Transformer-MoE checkpoint to ONNX.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", help="A checkpoint folder, original or compressed.")
        parser.add_argument("output", help="The folder to write; it must not exist.")
        parser.add_argument("--to", default="onnx", help="The exporter.")

    def run(self) -> None:
        import cli

        # the click command prints its own errors and decides the exit code, which optimum-cli would drop
        cli.main(["export", self.args.model, "--to", self.args.to, "-o", self.args.output])


REGISTER_COMMANDS = [(CompressExportCommand, ExportCommand)]
