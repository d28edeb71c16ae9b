"""Offline stages: labels that are computed before training, kept on disk, and seen by training as maps.

A stage is a list of steps (`steps.py`), each of which reads what steps before it gave, by their names:

    MapStep     every picture by itself: pictures in, one `cache.Record` a picture out; through `Trainer.predict`,
                shards shared out among the ranks
    ReduceStep  once, over all records: named arrays (a table of centroids, the class of every region); on rank 0
    FitStep     a LightningModule trained on pictures and a view of what is there; its weights serve later steps

A method with a stage derives from `StagedSegmenter` (lightning_modules/base/staged.py), gives the steps (`steps()`) and
takes their results (`staged(results, data)`): it copies a table into a buffer, sets `data.pseudo` to a view
(`views.py`), whose label maps then come with every training batch as `pseudo` and go through all its geometry, or keeps
a `Records` to read soft maps by `batch["index"]`. `run.py pseudo method=…` runs the steps alone, `run.py train` those
that are missing. `engine/stages/stage.py` runs them; `cache.py` says how they are kept, and when they are made anew.

A further method with a stage writes steps of its own and changes nothing here: `tests/pseudo_labels/test_sketch.py` has
MaskDistill's chain. What a method like TransFGU needs, and where it is: gradients inside a map (`MapStep.gradients`),
maps of all concepts (a float16 field [K,h,w]; `views.Soft` for the classes, `Records.read` for the maps themselves),
tables (`ReduceStep.table`), an estimate before the work starts (`MapStep.record_bytes` for the disk; `announce` says
how many passes a step will make, or refuses), a choice of pictures (`MapStep.pictures`).
"""
