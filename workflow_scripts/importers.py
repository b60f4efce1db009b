"""Command lines of what reads other projects' files, and of the export."""

from lpovod.importers.checkpoints import (
    export_checkpoint,
    import_base_detector,
    import_linear_probe,
)
from lpovod.importers.proposals import import_proposals
from lpovod.importers.pseudo_labels import import_pseudo_labels
from workflow_scripts import run

if __name__ == "__main__":
    run(
        import_proposals,
        import_base_detector,
        import_linear_probe,
        import_pseudo_labels,
        export_checkpoint,
    )
