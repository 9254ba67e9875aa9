"""Write the checkpoint of a manifest, and prove it: predicted bytes against written bytes.

With --format compressed-tensors the same tensors are declared so that stock vLLM and Hugging Face transformers load
them without this package. The manifest must have equal widths inside each fused layer: `gamma solve --fusion tied`.
"""

import argparse
from pathlib import Path

from allocator.cli.options import add_json, add_model, add_progress
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.outputs import check_output_folder

EXAMPLES = """examples:
  gamma export ./Qwen3-8B --manifest manifest.json --bank work/bank --out Qwen3-8B-gamma
  vllm serve Qwen3-8B-gamma
  gamma export ./Qwen3-8B --manifest tied.json --bank work/bank --format compressed-tensors --out Qwen3-8B-ct"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--manifest", type=Path, required=True, help="manifest of `gamma solve`, `refine` or `tune`")
    parser.add_argument(
        "--bank", type=Path, required=True, help="bank folder of `gamma learn`, or of `tune` with its manifest"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--format",
        choices=["gamma", "compressed-tensors"],
        default="gamma",
        help="gamma: any widths, served with the plugin (default); compressed-tensors: also loaded without it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a gamma checkpoint at --out")
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.manifest import Manifest
    from allocator.export import ExportSettings
    from allocator.pipeline import export, resolve_model
    from allocator.report.documents import export_document
    from allocator.report.tables import export_table
    from allocator.run.journal import finish_step_on_sigterm

    check_output_folder(args.out, replaced=True)
    manifest = Manifest.read(args.manifest)
    with finish_step_on_sigterm(), show_progress(args.progress) as progress:
        model = resolve_model(args.model, args.revision)
        report = export(manifest, model, args.bank, args.out, ExportSettings(args.format, args.overwrite), progress)
    if args.json:
        print_json(export_document(report))
    else:
        print_tables(export_table(report))
