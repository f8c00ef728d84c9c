"""A Transformer of 355 million parameters at 10% of its weights, on text of your own: for one accelerator with 40 GB or more.

    python launch.py --config=configs/lm_350m.py --workdir=runs/lm_350m --config.data.dir=TEXT --config.data.tokenizer=TOKENIZER.json

TEXT is a folder of UTF-8 files (*.txt at any depth; many of them, as they are split by file), TOKENIZER.json one of the library
tokenizers, such as GPT-2's; with its 50,257 tokens and one for the end of a file the network has 355,077,120 parameters,
303,562,752 of them in sparse leaves. Tokens are held in memory, two bytes each with up to 65,535 of them.

5,000 steps of 512 sequences of 1,024 tokens (2.6 billion tokens), AdamW, cosine to a tenth after 500 steps of warm-up, bfloat16 with
float32 masters, 16 parts a batch, masks updated every 100 steps for the first three quarters. Sizes are those of GPT-3 medium (Brown et
al., 2020, table 2.1), with SwiGLU. Not run here, and no result with these settings is published. Cost by arithmetic, 6 operations a
parameter and token: 5.6e18, an hour and a half at 1e15 a second and well over that in practice.
"""

from sparse_jax import config as config_lib

VARIANTS = ()


def get_config(variant: str = '') -> config_lib.Config:
    if variant:
        raise ValueError(f'the variant {variant!r} does not exist: give none.')
    config = config_lib.Config()
    config.model.name, config.model.dtype, config.model.remat = 'transformer', 'bfloat16', 'all'
    config.model.depth, config.model.features, config.model.heads = 24, 1024, 16
    config.data.name, config.data.dir, config.data.length, config.data.validation = 'text', 'data/text', 1024, 0.005
    config.data.batch_size, config.data.eval_batch_size = 512, 32
    config.optimizer.name, config.optimizer.schedule = 'adamw', 'cosine'
    config.optimizer.learning_rate, config.optimizer.warmup_steps, config.optimizer.final_factor = 3e-4, 500, 0.1
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.1, 1.0
    config.train.steps, config.train.eval_every, config.train.accumulate = 5000, 500, 16
    config.sparsity.density, config.sparsity.update_every, config.sparsity.stop_step = 0.1, 100, 3750
    config.checkpoint.every, config.log.every = 250, 10
    return config
