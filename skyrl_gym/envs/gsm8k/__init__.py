"""GSM8K: word problems whose answer is a number after ####."""
