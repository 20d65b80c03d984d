"""Serves a page to play with a saved pipeline: draw, reconstruct, sample, complete, swap codes.

python scripts/demo.py --run runs/digits-vqvae
python scripts/demo.py --run user/name --port 8000 --device cuda

It needs Gradio: pip install 'tessera-codes[demo]'. The page is for this machine alone and asks nothing of the network.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import parse
from pipelines.demo.actions import Limits
from pipelines.demo.server import check_port, import_gradio, serve
from pipelines.pipeline_index import INDEX_NAME
from pipelines.runs import find_run, load_pipeline
from pipelines.scripting import choose_device, refuse_several_processes, run_script


@dataclass
class Options:
    """What is served, and where.

    Args:
        run: run folder, pipeline folder or hub id; default the newest pipeline under runs/.
        host: address to listen at. Others than the default can be reached from other machines, without a password.
        port: default the first free one from 7860 on.
        device: where to compute; default an accelerator if there is one.
        max_images: most images drawn at a time.
        max_candidates: most completions at a time.
        max_upload_bytes: largest file that may be uploaded.
        max_pixels: largest picture that may be uploaded, in pixels before it is resized.
    """

    run: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    device: str | None = None
    max_images: int = 64
    max_candidates: int = 16
    max_upload_bytes: int = 8_000_000
    max_pixels: int = 16_000_000


def main() -> None:
    refuse_several_processes()
    config = parse(__doc__, {}, Options)
    limits = Limits(**{name: config[name] for name in Limits.__dataclass_fields__})
    device = choose_device(config["device"])
    run = find_run(None, INDEX_NAME) if config["run"] is None else config["run"]
    import_gradio()
    check_port(config["host"], config["port"])
    pipeline = load_pipeline(run, device)
    pipeline.set_progress_bar_config(disable=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files are removed
    serve(pipeline, limits, Path(run).name, host=config["host"], port=config["port"])


if __name__ == "__main__":
    run_script(main)
