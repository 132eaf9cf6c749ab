package main

import "math/rand/v2"

// batchImages appends the images that a worker computes its next gradient from to dst. In synchronous mode they are
// its part of the step's batch, which all workers draw from the same permutation; otherwise the worker draws for
// itself, so that training goes on unbiased whoever joins or dies.
func batchImages(dst []int, cfg *trainConfig, trainSize int, a assignment, worker int, clock uint64) []int {
	if cfg.sync {
		order := permutation(cfg.seed, uint64(a.epoch), trainSize)
		lo := a.batch * cfg.batch
		for i, image := range order[lo:min(lo+cfg.batch, trainSize)] {
			if i%a.of == a.rank {
				dst = append(dst, image)
			}
		}
		return dst
	}
	rng := rand.New(rand.NewPCG(cfg.seed+uint64(worker)<<32, clock))
	for range cfg.share() {
		dst = append(dst, rng.IntN(trainSize))
	}
	return dst
}

// computeGradient fills g with the sum of the images' gradients at params, and returns the sum of their losses.
func computeGradient(g, params []float32, train []digit, images []int) (loss float64) {
	clear(g)
	for _, i := range images {
		loss += addGradient(g, params, &train[i])
	}
	return loss
}
