"""Searches for the configuration that trains to an accuracy fastest; every trial is an elastic run.

Files of an experiment, `<storage>/<name>/`, all of them written by this module's process alone and
replaced as a whole (a reader never sees half a file):

`experiment.json`
    `name`; `space`: the resolved search space (a mapping, as `SearchSpace.model_dump(mode="json")`);
    `objective`: `{metric, mode: "min", unit}`; `target_accuracy`; `rule_for_censored`: a sentence;
    `started`: Unix time of the first call; `updated`; `status`: `running | finished | interrupted |
    failed`; `hardware` and `versions`: mappings of strings; `n_repeats`: seeds per point;
    `references`: name -> `{config: resolved configuration, rows: [trials.csv rows as mappings]}`, of
    which `default` is the base configuration itself (also at the top as `default`), and others such
    as `sgd` are what the space names beside it; `best`: trial id of the best finished search trial
    (the median repeat of the best point) or null; `best_point`: number of that point or null;
    `parameters`: the searched `section.key` names; `confirmation`: null, or `{n, rows: {best: [...],
    <reference>: [...]}}`: the winner and the references once more with seeds that the search did not
    see.
`trials.csv`
    One row per trial, rewritten after every change: `trial_id`, `stage` (`reference | search |
    confirm`), `point` (number of the searched point, or the name of the reference), `status`
    (`running | finished | stopped | failed | refused | pending`), `reason`, `seed`, one column per
    parameter (`section.key`), `objective`, `reached` (`true`/`false`/empty),
    `train_time_to_accuracy_s`, `time_to_accuracy_s`, `steps`, `train_time_s`, `worker_seconds`,
    `cpu_seconds`, `best_accuracy`, `peak_memory_bytes`, `started`, `ended` (Unix time),
    `run_folder` (relative to the experiment's folder), `parent` (trial that a PB2 clone took its
    state from). Unknown values are empty.
`trials/<trial_id>/`
    An ordinary run folder: `config.yaml`, `metrics.jsonl`, `events.jsonl`, `result.json`, …; absent
    for refused and pending trials.
`best_config.yaml`
    What `elastic-kfac train` takes as it is; there once a search trial has finished.
`tune/`
    Ray Tune's own files; TensorBoard events of every trial (`tensorboard --logdir <folder>`).
"""
