class Detokenizer:
    def __init__(self, decode, stop=()):
        self.decode, self.tokens, self.shown, self.stopped = decode, [], "", False

    @property
    def used(self):
        return len(self.tokens)

    def push(self, tokens):
        self.tokens += tokens
        return ""

    def finish(self):
        return self.decode(self.tokens)
