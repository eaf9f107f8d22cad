"""TRL's names of arguments, and what they are called here.

They are those of TRL 1.12's `PPOTrainer` and `PPOConfig`, of TRL 1.16's GRPO and RLOO, and of the PPO before
TRL 0.12. A value is the name here, or a few words with it. "nothing: reason" has no counterpart. Error
messages read the tables; docs/from-trl.md has the differences.
"""

DATA = "nothing: the trainer makes its own batches of prompts"
LOSS = "nothing: the loss is PPO's"
ONE_RESPONSE = "nothing: a critic replaces the group of responses, so each prompt gets one"
ADAPTERS = "nothing: the adapter 'default' is trained, and one named 'reference' is the reference"
MINIBATCH = "per_device_train_batch_size × gradient_accumulation_steps"
SAMPLES = "nothing: each evaluation writes samples.jsonl; set eval_steps"
VLLM = "generate of PPOTrainer, or rollouts in ppo.yaml"

# Keyword arguments of trainers -> those of `PPOTrainer`.
TRAINER_NAMES = {
    "ref_model": "nothing: the reference is a frozen copy of the policy, or under LoRA its base",
    "reward_model": "reward",
    "value_model": "critic=Critic('model', model=…)",
    "tokenizer": "processing_class",
    "dataset": "train_dataset",
    "config": "args",
    "quantization_config": "nothing: load the policy with it first",
    "rollout_func": "generate",
    "tools": "nothing: a response is one turn",
    "environment_factory": "nothing: a response is one turn",
    "data_collator": DATA,
    "model_init": "policy",
    "compute_loss_func": LOSS,
    "compute_metrics": "nothing: evaluations sample and score responses",
    "preprocess_logits_for_metrics": "nothing: evaluations sample and score responses",
}

# Fields of configs -> those of `PPOConfig`.
CONFIG_NAMES = {
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "kl_penalty": "kl_estimator",
    "adap_kl_ctrl": "kl_target",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "max_completion_length": "response_tokens",
    "max_new_tokens": "response_tokens",
    "response_length": "response_tokens",
    "stop_token_id": "stop_token, the text of that token",
    "num_iterations": "num_ppo_epochs",
    "ppo_epochs": "num_ppo_epochs",
    "steps": "num_rollouts, times the responses of a rollout,",
    "total_episodes": "num_rollouts, times the responses of a rollout,",
    "num_total_batches": "num_rollouts",
    "batch_size": f"{MINIBATCH} × num_mini_batches × processes",
    "local_batch_size": f"{MINIBATCH} × num_mini_batches",
    "mini_batch_size": f"{MINIBATCH} × processes",
    "local_mini_batch_size": MINIBATCH,
    "micro_batch_size": "per_device_train_batch_size × processes",
    "steps_per_generation": "gradient_accumulation_steps × num_mini_batches",
    "local_rollout_forward_batch_size": "generation_batch_size",
    "num_generations": ONE_RESPONSE,
    "num_generations_eval": "eval_samples",
    "cliprange": "clip_low and clip_high",
    "epsilon": "clip_low, and without epsilon_high clip_high,",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "cliprange_value": "clip_value",
    "whiten_rewards": "score_normalization",
    "use_score_scaling": "score_normalization",
    "use_score_norm": "score_normalization",
    "scale_rewards": "score_normalization",
    "reward_clip_range": "score_clip",
    "mask_truncated_completions": "missing_eos_penalty",
    "vllm_importance_sampling_cap": "importance_cap",
    "vllm_importance_sampling_clip_max": "importance_cap",
    "normalize_advantages": "nothing: advantages are always normalized",
    "loss_type": LOSS,
    "importance_sampling_level": LOSS,
    "num_sample_generations": SAMPLES,
    "log_completions": SAMPLES,
    "reward_funcs": "reward_funcs of PPOTrainer, or reward in ppo.yaml",
    "reward_weights": "reward_weights of PPOTrainer, or weight of a reward in ppo.yaml",
    "reward_model_path": "reward of PPOTrainer or ppo.yaml",
    "sft_model_path": "policy of PPOTrainer or ppo.yaml",
    "model_adapter_name": ADAPTERS,
    "ref_adapter_name": ADAPTERS,
    "model_init_kwargs": "nothing: load the policy with them and pass the model",
    "trust_remote_code": "nothing: load the policy with it and pass the model, or set it beside training:",
    "disable_dropout": "nothing: there is no dropout",
    "shuffle_dataset": "nothing: each pass over the prompts has a new order",
    "chat_template_kwargs": "nothing: one template everywhere",
    "sync_ref_model": "nothing: the reference stays as it is",
    "dataset_num_proc": DATA,
    "world_size": "nothing: the launch sets it",
    "ds3_gather_for_generation": "nothing: the launch decides how weights are sharded",
    "use_vllm": VLLM,
    "vllm_mode": VLLM,
    "vllm_server_base_url": VLLM,
}
