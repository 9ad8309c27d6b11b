"""What the scripts that draw share."""


def pyplot():
    """Matplotlib's, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
