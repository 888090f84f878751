"""The condition: masked image tokens or a caption, through the residual query adapter and the frozen
multimodal LLM."""
