"""Keys and values that are kept of the past.

  kv_cache          the cache, the update that new tokens make, and where new tokens stand
  cached_attention  attention from new tokens to a cache and to each other
  policy            the protocol of what is kept, and compression to a budget
  policies          full; window; sink_recent, StreamingLLM (arXiv 2309.17453)
"""
