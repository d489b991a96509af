"""The recurrent mixers that the experiments on synthetic tasks compare, each in stacks of its own."""
RECURRENT = ("m", "gla", "gdn", "kda", "rwkv", "hgrn", "mlstm", "ssm", "gru", "griffin")
