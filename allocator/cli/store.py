"""Fill and list a store: a folder or object storage (s3://, gs://) that the sidecar and `gamma prepare` read."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.cli.options import add_json, add_progress
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.errors import InputError

if TYPE_CHECKING:
    from allocator.contract.manifest import Manifest
    from allocator.sidecar.store import Source, Store

EXAMPLES = """examples:
  gamma store add work --model ./Qwen3-8B --store /store
  gamma store add work --model Qwen/Qwen3-8B --store s3://models/gamma --copy-model
  gamma store add-manifest tested.json --store /store
  gamma store push Qwen3-8B hf://org/Qwen3-8B-scores --store /store --model hf://Qwen/Qwen3-8B
  gamma store pull oci://registry.example.com/scores/qwen3-8b:v1 --store s3://models/gamma
  gamma store list --store /store
  gamma store remove Qwen3-8B --store /store --dry-run"""


_ADDRESSES = "hf://owner/name[@revision], or oci://host/repository:tag"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="add|add-manifest|push|pull|list|remove", required=True)
    add = verbs.add_parser("add", help="publish the bank and scores of a work folder")
    add.add_argument("work", type=Path, metavar="WORK", help="folder that `gamma learn` wrote")
    add.add_argument("--model", required=True, help="the model folder or hub id that it was learned from")
    add.add_argument("--revision", help="branch, tag or commit of a hub id")
    add.add_argument("--name", help="name to offer it under (default: the model's); may be added again under more")
    add.add_argument(
        "--copy-model",
        action="store_true",
        help="put the 16-bit model into the store too, so that nothing else is needed to make checkpoints",
    )
    add.add_argument(
        "--manifest",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="manifest of these scores, to be served by its digest; what it says was measured (`gamma solve --verify`, "
        "`gamma refine`) is drawn beside the curve; may be repeated",
    )
    more = verbs.add_parser("add-manifest", help="add manifests of scores that the store has, as add --manifest does")
    more.add_argument("manifest", type=Path, nargs="+", metavar="MANIFEST", help="manifest, or folder of a checkpoint")
    pushing = verbs.add_parser("push", help="share scores and bank in a hub repository or an OCI registry")
    pushing.add_argument("which", metavar="NAME", help="name in the store, or digest of scores or of a model")
    pulling = verbs.add_parser("pull", help="take over what somebody pushed: nothing needs to be learned")
    for verb in (pushing, pulling):
        verb.add_argument("address", metavar="ADDRESS", help=f"{_ADDRESSES}; logins are those of hf, docker and podman")
        verb.add_argument("--scores-only", action="store_true", help="without the bank: enough to plan and solve")
    pushing.add_argument(
        "--model", help="where others find the 16-bit model: hf://org/name@revision (default: what the store says)"
    )
    pulling.add_argument("--name", help="name to offer it under (default: the one it was shared with)")
    pulling.add_argument("--model", help="where the 16-bit model is here: a folder, or hf://org/name@revision")
    listing = verbs.add_parser("list", help="what a store offers")
    removal = verbs.add_parser("remove", help="take a model off, with all that nothing else in the store needs")
    removal.add_argument("which", metavar="NAME", help="name in the store, or digest of scores or of a model")
    removal.add_argument("--dry-run", action="store_true", help="say what would go and what would stay, delete nothing")
    for verb in (add, more, pushing, pulling, listing, removal):
        verb.add_argument("--store", required=True, metavar="DIR_OR_URL", help="a folder, s3:// or gs://")
        add_json(verb)
    for verb in (add, pushing, pulling):
        add_progress(verb)


def run(args: argparse.Namespace) -> None:
    from allocator.sidecar.store import Store

    store = Store(args.store)
    if args.action in ("push", "list", "remove"):
        store.check()
    actions = {
        "add": _add, "add-manifest": _add_manifests, "push": _push, "pull": _pull, "list": _list, "remove": _remove,
    }  # fmt: skip
    actions[args.action](args, store)


def _add(args: argparse.Namespace, store: "Store") -> None:
    from allocator.pipeline import resolve_model
    from allocator.report.differences import read_manifest
    from allocator.sidecar.publish import publish, publish_manifest
    from allocator.sidecar.store import Source

    store.check_writable()
    manifests = [read_manifest(path) for path in args.manifest]
    with show_progress(args.progress) as progress:
        folder = resolve_model(args.model, args.revision)
        source = Source(kind="store") if args.copy_model else _source(args.model, args.revision)
        published = publish(args.work, folder, store, source, args.name, progress)
    for manifest in manifests:
        publish_manifest(manifest, store)
    if args.json:
        digests = [manifest.digest for manifest in manifests]
        print_json({
            "entry": published.entry.payload(), "written_bytes": published.written_bytes, "manifests": digests,
        })  # fmt: skip
    else:
        entry = published.entry
        print_tables(
            f"{store.url} offers {entry.name}: scores {entry.scores_digest}, bank {entry.bank_digest}, "
            f"{published.written_bytes:,} bytes written",
            *map(_line, manifests),
        )


def _source(model: str, revision: str | None = None) -> "Source":
    from allocator.model.hf_config import split_hub
    from allocator.sidecar.store import Source

    if Path(model).is_dir():
        return Source(kind="folder", location=str(Path(model).resolve()))
    location, revision = split_hub(model, revision)
    if location.count("/") != 1 or location.startswith((".", "/", "~")):
        raise InputError(f"{model}: no such folder, and no Hugging Face id (org/name) either")
    return Source(kind="hub", location=location, revision=revision)


def _push(args: argparse.Namespace, store: "Store") -> None:
    from allocator.sidecar.remotes import open_remote
    from allocator.sidecar.sharing import push

    source = None if args.model is None else _source(args.model)
    with show_progress(args.progress) as progress:
        share, address = push(store, args.which, open_remote(args.address), source, args.scores_only, progress)
    if args.json:
        print_json({
            "address": address, "files": len(share.files), "bytes": share.nbytes, "scores": share.entry.scores_digest,
        })  # fmt: skip
    else:
        size = f"{len(share.files)} files, {share.nbytes:,} bytes"
        print_tables(f"{share.entry.name} is shared: {size}", f"exactly this: {address}")


def _pull(args: argparse.Namespace, store: "Store") -> None:
    from allocator.sidecar.remotes import open_remote
    from allocator.sidecar.sharing import pull

    store.check_writable()
    source = None if args.model is None else _source(args.model)
    with show_progress(args.progress) as progress:
        pulled = pull(open_remote(args.address), store, args.name, source, args.scores_only, progress)
    entry = pulled.entry
    if args.json:
        print_json({"entry": entry.payload(), "fetched_bytes": pulled.fetched_bytes})
    else:
        print_tables(
            f"{store.url} offers {entry.name}: scores {entry.scores_digest}, {pulled.fetched_bytes:,} bytes came"
        )


def _add_manifests(args: argparse.Namespace, store: "Store") -> None:
    from allocator.report.differences import read_manifest
    from allocator.sidecar.publish import publish_manifest

    store.check_writable()
    store.check()
    manifests = [read_manifest(path) for path in args.manifest]
    new = [publish_manifest(manifest, store) for manifest in manifests]
    if args.json:
        print_json([{"manifest": m.digest, "new": added} for m, added in zip(manifests, new, strict=True)])
    else:
        print_tables(*map(_line, manifests))


def _line(manifest: "Manifest") -> str:
    measured = "measured" if manifest.verification or manifest.refinement else "nothing measured"
    return f"manifest {manifest.digest}: {manifest.budget.requested}, {manifest.tensor_bytes:,} bytes, {measured}"


def _list(args: argparse.Namespace, store: "Store") -> None:
    from allocator.report.tables import new_table

    found = store.listing()
    entries = found.entries
    for reason in found.unreadable.values():
        print(f"gamma store: left out, cannot be read: {reason}", file=sys.stderr)
    if args.json:
        print_json([entry.payload() for entry in entries])
        return
    table = new_table(store.url)
    for column in ("model", "scores", "method", "widths", "GiB", "measured", "added"):
        table.add_column(column, no_wrap=True)
    for e in entries:
        low, high = (size / 2**30 for size in e.feasible_bytes)
        widths = ",".join(map(str, e.widths))
        measured = str(len(store.measured(e.scores_digest)))
        size = f"{low:.2f}-{high:.2f}"
        table.add_row(e.name, e.scores_digest[7:19], e.method, widths, size, measured, e.added[:10])
    print_tables(table)


def _remove(args: argparse.Namespace, store: "Store") -> None:
    from allocator.sidecar.removal import plan_removal, remove

    removal = plan_removal(store, args.which)
    if not args.dry_run:
        remove(store, removal)
    if args.json:
        print_json({
            "removed": removal.paths, "bytes": removal.nbytes, "kept": removal.kept, "dry_run": args.dry_run,
        })  # fmt: skip
        return
    what = "would be removed" if args.dry_run else "removed"
    print_tables(
        *(f"{nbytes:>16,}  {path}" for path, nbytes in removal.paths.items()),
        f"{what}: {len(removal.paths)} objects, {removal.nbytes:,} bytes",
        *(f"stays: {what}, {reason}" for what, reason in removal.kept.items()),
    )
