class Report:
    @staticmethod
    def of(r): ...


class Diff:
    @staticmethod
    def of(r): ...


class Explanation:
    def __init__(s, r):
        s.runtime = r
