package main

import (
	"math"
	"math/rand/v2"
)

// The model is a perceptron with one hidden layer, 64-32-10, whose parameters are one flat vector: it is what workers
// pull, and gradients, which have the same shape, are what they push.
const (
	hidden = 32

	offW1      = 0
	offB1      = offW1 + hidden*pixels
	offW2      = offB1 + hidden
	offB2      = offW2 + classes*hidden
	paramCount = offB2 + classes // 2,410 float32, 9,640 bytes
)

// initParams fills p with the start of training, the same for the same seed (He initialization).
func initParams(p []float32, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))
	fill := func(w []float32, fanIn int) {
		s := math.Sqrt(2 / float64(fanIn))
		for i := range w {
			w[i] = float32(rng.NormFloat64() * s)
		}
	}
	clear(p)
	fill(p[offW1:offB1], pixels)
	fill(p[offW2:offB2], hidden)
}

// forward computes the hidden activations and the class probabilities of one image.
func forward(p []float32, x *[pixels]float32, h *[hidden]float32, prob *[classes]float32) {
	w1, b1, w2, b2 := p[offW1:offB1], p[offB1:offW2], p[offW2:offB2], p[offB2:paramCount]
	for j := range h {
		w := w1[j*pixels:][:pixels]
		s := b1[j]
		for i, v := range x {
			s += w[i] * v
		}
		h[j] = max(s, 0)
	}
	top := float32(math.Inf(-1))
	for k := range prob {
		w := w2[k*hidden:][:hidden]
		s := b2[k]
		for j, v := range h {
			s += w[j] * v
		}
		prob[k] = s
		top = max(top, s)
	}
	var sum float32
	for k, s := range prob {
		e := float32(math.Exp(float64(s - top))) // the largest exponent is 0: no overflow
		prob[k] = e
		sum += e
	}
	for k := range prob {
		prob[k] /= sum
	}
}

// addGradient adds the gradient of one image's cross-entropy loss at parameters p to g, and returns the loss.
func addGradient(g, p []float32, d *digit) float64 {
	var h, dh [hidden]float32
	var prob [classes]float32
	forward(p, &d.x, &h, &prob)
	loss := -math.Log(max(float64(prob[d.label]), 1e-12))

	w2 := p[offW2:offB2]
	gw1, gb1, gw2, gb2 := g[offW1:offB1], g[offB1:offW2], g[offW2:offB2], g[offB2:paramCount]
	for k := range prob {
		delta := prob[k]
		if k == int(d.label) {
			delta--
		}
		gb2[k] += delta
		w, gw := w2[k*hidden:][:hidden], gw2[k*hidden:][:hidden]
		for j := range h {
			gw[j] += delta * h[j]
			dh[j] += delta * w[j]
		}
	}
	for j := range dh {
		if h[j] == 0 {
			continue
		}
		gb1[j] += dh[j]
		gw := gw1[j*pixels:][:pixels]
		for i, v := range d.x {
			gw[i] += dh[j] * v
		}
	}
	return loss
}

// accuracy is the share of the images that the model names rightly.
func accuracy(p []float32, ds []digit) float64 {
	var h [hidden]float32
	var prob [classes]float32
	right := 0
	for i := range ds {
		forward(p, &ds[i].x, &h, &prob)
		best := 0
		for k := range prob {
			if prob[k] > prob[best] {
				best = k
			}
		}
		if best == int(ds[i].label) {
			right++
		}
	}
	return float64(right) / float64(len(ds))
}

// optimizer is stochastic gradient descent with momentum and a rate that falls evenly to a tenth, so that training ends
// in a quiet place. It lives on the server: workers only compute gradients.
type optimizer struct {
	rate, momentum float32
	velocity       [paramCount]float32
}

// apply moves p against sum/count, the mean gradient of count images. progress is the part of the training that is
// done, 0 to 1.
func (o *optimizer) apply(p, sum []float32, count int, progress float64) {
	step := o.rate * float32(1-0.9*min(progress, 1)) / float32(count)
	for i := range p {
		o.velocity[i] = o.momentum*o.velocity[i] - step*sum[i]
		p[i] += o.velocity[i]
	}
}

// permutation is the order in which an epoch visits n training images; every process computes the same.
func permutation(seed, epoch uint64, n int) []int {
	return rand.New(rand.NewPCG(seed, epoch+1)).Perm(n)
}
