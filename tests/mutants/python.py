"""Faults in Python code that is no kernel."""

from .mutant import TRAIN, Mutant

PYTHON = [
    Mutant(
        "python: the hidden layer is computed again without its bias",
        "pygpt/ops/mlp.py",
        r"kernels\.mlp_fwd\(x, fc_weight, fc_bias, proj_weight\[:0\]",
        r"kernels.mlp_fwd(x, fc_weight, None, proj_weight[:0]",
        ("tests/ops/test_mlp.py", "same_bits_with_save_input"),
    ),
    Mutant(
        "python: the hidden layer is kept, whatever save says",
        "pygpt/ops/mlp.py",
        r'activation, save\)\n        if save == "input":',
        r'activation, "all")\n        if False:',
        ("tests/ops/test_mlp.py", "same_bits_with_save_input"),
    ),
    Mutant(
        "python: every step has the same dropout",
        "pygpt/train.py",
        r'seed_of\("dropout", s\.seed, self\.done\)',
        r'seed_of("dropout", s.seed)',
        (TRAIN, "dropout_differs"),
    ),
    Mutant(
        "python: the gradient scaler is not resumed",
        "pygpt/train.py",
        r'self\.scaler\.load_state_dict\(metadata\["scaler"\]\)',
        r"pass",
        (TRAIN, "scaler_is_resumed"),
    ),
    Mutant(
        "python: bfloat16 is trained as float16",
        "pygpt/train.py",
        r'"bfloat16": torch\.bfloat16',
        r'"bfloat16": torch.float16',
        (TRAIN, "16_bits"),
    ),
    Mutant(
        "python: bfloat16's gradients are scaled too",
        "pygpt/train.py",
        r'enabled=s\.dtype == "float16"',
        r'enabled=s.dtype in ("float16", "bfloat16")',
        (TRAIN, "16_bits"),
    ),
    Mutant(
        "python: AdamW decays vectors too",
        "pygpt/train.py",
        r'\{"params": vectors, "weight_decay": 0\.0\}',
        r'{"params": vectors, "weight_decay": s.weight_decay}',
        (TRAIN, "plain_training_step"),
    ),
    Mutant(
        "python: evaluation keeps dropout on",
        "pygpt/train.py",
        r"self\.model\.eval\(\)",
        r"self.model.train()",
        (TRAIN, "evaluation_changes_nothing"),
    ),
    Mutant(
        "python: gradients are not zeroed after a step",
        "pygpt/train.py",
        r"self\.optimizer\.zero_grad\(\)",
        r"pass",
        (TRAIN, "plain_training_step"),
    ),
    Mutant(
        "python: the reference forgets to centre a norm's gradient",
        "pygpt/ops/norm.py",
        r"\(dx if mean is None else dx - g\.mean\(-1, keepdim=True\)\)",
        r"dx",
        ("tests/ops/test_reference.py", "explicit_formulas", "layer_norm"),
    ),
    Mutant(
        "python: a choice of backend outlives its block",
        "pygpt/dispatch.py",
        r"state\.chosen, state\.cache = previous",
        r"pass",
        ("tests/dispatch/test_backend.py", "choice_nests"),
    ),
]
