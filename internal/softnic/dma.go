//go:build !race

package softnic

// dmaPiece is how much is copied at a time: copies from 1 MiB on bypass the caches on some processors, which between two
// processes of one host is several times slower than copying the same in pieces.
const dmaPiece = 64 << 10

// dma copies between registered memory, as a NIC's DMA engine would.
func dma(dst, src []byte) int {
	if len(src) <= dmaPiece {
		return copy(dst, src)
	}
	return dmaLarge(dst, src)
}

func dmaLarge(dst, src []byte) (n int) {
	for {
		k := copy(dst, src[:min(len(src), dmaPiece)])
		n += k
		dst, src = dst[k:], src[k:]
		if len(dst) == 0 || len(src) == 0 {
			return n
		}
	}
}
