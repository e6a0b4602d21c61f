def render(d):
    return ""
