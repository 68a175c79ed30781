"""Model families by the ``model_type`` of the class that runs.

``tests/test_parity.py`` checks every name in here.
"""

# Backbones whose packed scores and gradients equal Hugging Face's. Others run at level "head":
# some pass a sliding window to the mask and another one, or none, to the attention function.
TRIE_BACKBONES = frozenset(
    """
    arcee biogpt deepseek_v3 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox
    gpt_oss helium jetmoe llama minicpm3 ministral ministral3 mistral mixtral olmo olmo2 olmo3
    persimmon phi phi3 qwen2 qwen3 qwen3_moe seed_oss smollm3 starcoder2
    """.split()
)

# Those that give their last hidden states the shape of the input; others end with a norm alone.
RESHAPING = frozenset({"gpt2", "gpt_bigcode"})

# Sequence classifiers that write out transformers' generic last-token forward for themselves.
LAST_TOKEN_HEADS = frozenset(
    "biogpt bloom falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mpt opt".split()
)
