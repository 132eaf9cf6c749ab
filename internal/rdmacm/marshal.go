package rdmacm

import "encoding/binary"

const (
	hdrSize = 8 // struct rdma_ucm_cmd_hdr
	// slotSize holds every command with its response.
	slotSize = 1024
)

// A slot is memory in which a command is built and answered; it does not move.
type slot struct {
	mem  []byte // aligned to 8 bytes
	addr uint64
}

// marshal builds the command, and returns its length and where what it refers to lies.
func (s slot) marshal(c *command) (n, ref int) {
	n = hdrSize + len(c.in)
	ref = (n + 7) &^ 7
	clear(s.mem[:ref+len(c.ref)])
	le := binary.NativeEndian
	le.PutUint32(s.mem[0:], c.code)
	le.PutUint16(s.mem[4:], uint16(len(c.in))) // both in bytes
	le.PutUint16(s.mem[6:], uint16(c.outSize))
	copy(s.mem[hdrSize:], c.in)
	if len(c.ref) > 0 {
		le.PutUint64(s.mem[hdrSize+c.refAt:], s.addr+uint64(ref))
		copy(s.mem[ref:], c.ref)
	}
	return n, ref
}

// unmarshal takes the response out.
func (s slot) unmarshal(c *command, ref int) { copy(c.ref, s.mem[ref:]) }
