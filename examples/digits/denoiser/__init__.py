"""A small Ideogram 4 that draws digits: data, network, outliers, sampler and classifier."""
