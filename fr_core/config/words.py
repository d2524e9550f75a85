"""Words of other code, such as ``learning_rate`` or ``arcface``, and what bigface calls them."""

RUN_OPTION = "is an option of the command, not a field"

# Words of other code for a field, and what to write instead; {value} is the value that stands behind the word.
WORDS = (
    ("learning_rate base_lr init_lr lr", "the learning rate is optim.lr: write optim.lr={value}"),
    (
        "batch_size batch bs total_batch_size train_batch_size",
        "the batch of all workers together is train.global_batch: write train.global_batch={value}",
    ),
    (
        "batch_size_per_gpu per_gpu_batch_size micro_batch_size samples_per_gpu",
        "the batch of all workers together is train.global_batch: write workers × {value} there",
    ),
    (
        "num_classes n_classes class_num num_class num_identities num_ids identities",
        "the classes are counted from the shards: leave it out",
    ),
    ("num_image num_images num_samples", "the images are counted from the shards: leave it out"),
    ("num_epoch num_epochs n_epochs epoch max_epochs", "the epochs are train.epochs: write train.epochs={value}"),
    (
        "steps num_steps total_steps total_step max_iter iterations",
        "the run's length is train.epochs; to stop early write train.max_steps={value}",
    ),
    (
        "warmup warmup_epoch warmup_steps",
        "the warm-up is schedule.warmup_epochs, in epochs: write schedule.warmup_epochs=1",
    ),
    ("wd l2", "the weight decay is optim.weight_decay: write optim.weight_decay={value}"),
    (
        "embedding_size embedding_dim embed_dim emb_size feature_dim feat_dim num_features",
        "the width of the embedding is net.embedding: write net.embedding={value}",
    ),
    (
        "image_size img_size size resolution crop_size",
        "the side of the input, in pixels, is net.input_size: write net.input_size={value}",
    ),
    (
        "backbone network arch architecture model",
        "the backbone is net.kind and net.depth: write {backbone}; for weights to start from write init.backbone=RUN",
    ),
    (
        "margin margin_list loss_margin",
        "the margin is the section method.margin: write method.margin.m2=0.5 method.margin.m3=0 for ArcFace, "
        "method.margin.m2=0 method.margin.m3=0.4 for CosFace",
    ),
    ("s logit_scale", "the scale of the logits is method.margin.scale: write method.margin.scale={value}"),
    (
        "loss criterion loss_type loss_name head head_type",
        "the loss follows from method.kind and method.margin: write method.kind=bigface, and method.margin.m2 or m3",
    ),
    (
        "num_workers data_workers dataloader_workers",
        "bigface reads data without DataLoader workers: leave it out; for workers that train give --workers N",
    ),
    (
        "workers gpus num_gpus n_gpus ngpus world_size nproc_per_node devices",
        "the number of workers is set at launch: give --workers N",
    ),
    ("fp16 amp use_amp mixed_precision half", "the precision is train.precision: write train.precision=float16"),
    ("bf16", "the precision is train.precision: write train.precision=bfloat16"),
    ("dtype", "the precision is train.precision: write train.precision={value}"),
    (
        "output output_dir out out_dir save_dir work_dir workdir exp_dir log_dir ckpt_dir",
        f"the run's folder {RUN_OPTION}: give --out DIR",
    ),
    ("resume resume_from", f"resuming {RUN_OPTION}: give --resume and the run's --out"),
    (
        "pretrained pretrained_path checkpoint ckpt weights",
        "the weights to start from are init.backbone: write init.backbone={value}",
    ),
    (
        "rec rec_path root root_dir data_dir data_root dataset dataset_path train_data",
        "the training set is data.path, a folder of shards: run bigface ingest {value} --out shards, "
        "then write data.path=shards",
    ),
    (
        "val_targets val val_set val_data eval_pairs test_pairs",
        "the pairs are verify.pairs: write verify.pairs=FILE verify.images=DIR, or run bigface verify RUN --suite DIR",
    ),
    ("optimizer optimiser opt", "the optimiser is the section optim: write optim.kind=sgd, lars, adamw or muon"),
    (
        "scheduler lr_scheduler lr_schedule lr_policy",
        "the schedule of the learning rate is the section schedule: write schedule.kind=cosine, or another kind",
    ),
    (
        "lr_steps decay_epoch decay_epochs decay_steps",
        "the milestones are epochs of the schedule: write \"schedule={{kind='multistep', milestones=[10, 15]}}\"",
    ),
    (
        "gradient_acc grad_accum accumulation accumulation_steps gradient_accumulation_steps accumulate_grad_batches",
        "the micro-batches of a step are train.accumulate: write train.accumulate={value}",
    ),
    (
        "clip_grad grad_clip max_norm max_grad_norm gradient_clip gradient_clip_val",
        "the largest norm of the gradient is optim.clip: write optim.clip={value}",
    ),
    (
        "interclass_filtering_threshold filter_threshold",
        "the inter-class filter is method.drop_negatives_above: write method.drop_negatives_above={value}",
    ),
    ("pfc partial_fc pfc_rate", "Partial FC is method.sample_rate: write method.sample_rate=0.1"),
    (
        "frequent print_freq log_freq log_interval",
        "log lines come every train.log_every steps: write train.log_every={value}",
    ),
    (
        "save_freq save_interval ckpt_interval",
        "checkpoints come every train.save_every steps: write train.save_every={value}",
    ),
    (
        "eval_freq eval_interval val_interval",
        "verifications come every train.verify_every steps: write train.verify_every={value}",
    ),
    (
        "gradient_checkpointing activation_checkpointing use_checkpoint checkpointing",
        "activation checkpointing is train.recompute: write train.recompute=true",
    ),
    ("model_ema ema_decay", "the decay of the averaged weights is train.ema: write train.ema=0.999"),
    (
        "wandb use_wandb wandb_project tensorboard logger project",
        "MLflow records the run: write tracking.experiment=NAME, or tracking.uri=ADDRESS",
    ),
    ("device gpu cuda", "each worker takes its card, or the CPU, by itself: leave it out"),
    ("dali pin_memory prefetch_factor shuffle drop_last", "bigface plans the reading of data itself: leave it out"),
    (
        "mask mask_ratio mask_prob",
        "synthetic masks are the section data.masks: write data.masks.ratio=0.35",
    ),
)
MENDS = {word: mend for words, mend in WORDS for word in words.split()}

# Words of other code for a kind, and what to write instead.
ARCFACE = "write method.kind=bigface method.margin.m2=0.5 method.margin.m3=0"
COSFACE = "write method.kind=bigface method.margin.m2=0 method.margin.m3=0.4"
KINDS = {
    "arcface": f"ArcFace is a margin of bigface: {ARCFACE}",
    "cosface": f"CosFace is a margin of bigface: {COSFACE}",
    "amsoftmax": f"AM-Softmax is CosFace, a margin of bigface: {COSFACE}",
    "adaface": "AdaFace is a margin of bigface: write method.kind=bigface method.margin.kind=adaface",
    "magface": "MagFace is a margin of bigface: write method.kind=bigface method.margin.kind=magface",
    "curricularface": "CurricularFace is a margin of bigface: write method.kind=bigface method.margin.kind=curricular",
    "elasticface": "ElasticFace is a margin of bigface: write method.kind=bigface method.margin.kind=elastic_arc",
    "uniface": "UniFace is a margin of bigface: write method.kind=bigface method.margin.kind=uniface",
    "softmax": f"the class matrix is bigface's: {COSFACE}",
    "fc": f"the class matrix is bigface's: {COSFACE}",
    "partial_fc": "Partial FC samples the classes of bigface: write method.kind=bigface method.sample_rate=0.1",
    "pfc": "Partial FC samples the classes of bigface: write method.kind=bigface method.sample_rate=0.1",
    "distill": "bigface distils from a teacher: write method.kind=bigface method.distill.teacher=REF",
    "ekd": "EKD is a loss of quantface: write method.kind=quantface method.loss.kind=ekd",
    "step": "the kind is multistep: write \"schedule={kind='multistep', milestones=[10, 15]}\"",
    "steplr": "the kind is multistep: write \"schedule={kind='multistep', milestones=[10, 15]}\"",
    "linear": "the kind is polynomial: write \"schedule={kind='polynomial', power=1}\"",
    "adam": "the kind is adamw: write optim.kind=adamw",
}


def plain_name(word: str) -> str | None:
    """Return what bigface calls a word of other code, without the mend; None: no known word."""
    mend = MENDS.get(word.replace("-", "_").lower())
    return mend and mend.partition(": ")[0]
