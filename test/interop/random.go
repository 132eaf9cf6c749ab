package main

import "encoding/binary"

// splitMix is SplitMix64 (Steele, Lea, Flood 2014): a sequence of 64-bit numbers from a seed, which testdata/integrity.c
// computes as well.
type splitMix uint64

func (s *splitMix) next() uint64 {
	*s += 0x9e3779b97f4a7c15
	z := uint64(*s)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// below returns the next number modulo n.
func (s *splitMix) below(n int) int { return int(s.next() % uint64(n)) }

// fill writes numbers over b, little-endian; of the last one as much as there is room for.
func (s *splitMix) fill(b []byte) {
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, s.next())
	}
	if len(b) > 0 {
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], s.next())
		copy(b, last[:])
	}
}
