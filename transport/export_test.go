package transport

import "github.com/ringside-rdma/ringside/verbs/ib"

// PostRaw sends bytes as they are, as a broken peer would.
func (c *Conn) PostRaw(b []byte) error {
	s := &c.snd
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wr[0].Opcode, s.wr[0].Inline, s.wr[0].SGEs = ib.OpSend, b, nil
	return c.postLocked(true)
}
