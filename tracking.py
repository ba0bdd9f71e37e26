"""The log of a run in wandb too. What fails there is a warning, never the end of a training.

A resumed run continues its wandb run, whose id is kept in the run folder. Without login or network the run is recorded
in wandb/, to be uploaded with `wandb sync`.
"""

import os
import secrets
import sys
from pathlib import Path

from files import write_text


class Tracker:
    """The wandb run that belongs to a run folder; does nothing without a project."""

    def __init__(self, folder, project, config):
        """config: a dict of what is shown with the run."""
        self.run = None
        if project:
            self.run = start_wandb(Path(folder), project, config)

    def log(self, entry):
        """Send one line of the log, unless wandb has that step from before a resume."""
        if self.run and entry["step"] >= self.run.step:
            self._try(self.run.log, entry, step=entry["step"])

    def finish(self):
        """Wait until everything is sent."""
        if self.run:
            self._try(self.run.finish)

    def _try(self, call, *values, **options):
        try:
            call(*values, **options)
        except Exception as error:  # whatever wandb raises when its own process is gone
            warn(f"wandb failed, and gets nothing from now on: {error}")
            self.run = None


def start_wandb(folder, project, config):
    """Return the wandb run of a run folder, new or continued; offline if that fails, and None if that fails too."""
    kept = folder / "wandb-id"
    run_id = kept.read_text().strip() if kept.exists() else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    options = {"project": project, "name": folder.name, "config": config, "id": run_id, "resume": "allow"}
    try:
        write_text(kept, f"{run_id}\n")
        import wandb  # slow to import, and most runs do without

        try:
            return wandb.init(**options)
        except Exception as error:  # no login, no network, a project that is no name
            warn(f"wandb did not start ({error}); the run is recorded offline, in wandb/: upload it with `wandb sync`")
            wandb.teardown()  # or the id would be in use
            return wandb.init(**options, mode="offline")
    except Exception as error:
        warn(f"the run is not logged to wandb: {error}")
        return None


def warn(text):
    """Print a warning."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
