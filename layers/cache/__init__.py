"""Keys and values that are kept of the past.

  kv_cache  the cache, and attention to it and to new tokens
"""
