package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	_ "embed"
	"fmt"
	"io"
	"strconv"
	"strings"
)

//go:embed data/digits.csv.gz
var digitsGz []byte

const (
	pixels  = 64 // an 8x8 image
	classes = 10
	// Every heldOutEvery-th digit is kept from training, so that the split is the same in every process and every run.
	heldOutEvery = 5
)

// digit is one image, its pixels scaled to [0, 1], with the figure it shows.
type digit struct {
	x     [pixels]float32
	label uint8
}

// loadDigits returns the embedded data set in its fixed split: what is trained on, and what only measures accuracy.
func loadDigits() (train, heldOut []digit, err error) {
	z, err := gzip.NewReader(bytes.NewReader(digitsGz))
	if err != nil {
		return nil, nil, fmt.Errorf("digits: %w", err)
	}
	all, err := parseDigits(z)
	if err != nil {
		return nil, nil, err
	}
	for i := range all {
		if i%heldOutEvery == heldOutEvery-1 {
			heldOut = append(heldOut, all[i])
		} else {
			train = append(train, all[i])
		}
	}
	return train, heldOut, nil
}

// parseDigits reads lines of 64 pixel values of 0 to 16 and a label of 0 to 9, separated by commas.
func parseDigits(r io.Reader) ([]digit, error) {
	var out []digit
	sc := bufio.NewScanner(r)
	for line := 1; sc.Scan(); line++ {
		f := strings.Split(sc.Text(), ",")
		if len(f) != pixels+1 {
			return nil, fmt.Errorf("digits: line %d has %d fields, want %d", line, len(f), pixels+1)
		}
		var d digit
		for i, s := range f {
			limit := uint64(16)
			if i == pixels {
				limit = classes - 1
			}
			v, err := strconv.ParseUint(s, 10, 8)
			if err != nil || v > limit {
				return nil, fmt.Errorf("digits: line %d, field %d: %q is not a number of 0 to %d", line, i+1, s, limit)
			}
			if i == pixels {
				d.label = uint8(v)
			} else {
				d.x[i] = float32(v) / 16
			}
		}
		out = append(out, d)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("digits: %w", err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("digits: no data")
	}
	return out, nil
}
