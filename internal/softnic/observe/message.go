package observe

import (
	"encoding/binary"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// magic begins both messages; a different version of them has another number.
const magic = "ringside watch 1"

// Is reports whether what somebody says first is a Request, of any kind.
func Is(b []byte) bool { return len(b) >= len(magic) && string(b[:len(magic)]) == magic }

// A What is what an observer wants.
type What uint32

const (
	Counters What = 1 // once, as JSON in a memory file that comes with the Answer
	Packets  What = 2 // into the ring in the memory file that comes with the Request
)

// A Request is an observer's first message, and its only one.
type Request struct {
	What What
	// SnapLen is how much of a packet is wanted, bytes from the BTH on.
	SnapLen uint32
	// Ring is the length of the memory file, bytes.
	Ring uint32
	// To is the GID of the NIC that is meant; zero: of whichever NIC has called.
	To ib.GID
}

const requestLen = 16 + 4*4 + 16

// Encode returns the message.
func (r *Request) Encode() []byte {
	b := append(make([]byte, 0, requestLen), magic...)
	for _, v := range [...]uint32{uint32(r.What), r.SnapLen, r.Ring, 0} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return append(b, r.To[:]...)
}

// Decode reads the message; what it asks for is not looked at.
func (r *Request) Decode(b []byte) error {
	if len(b) != requestLen || !Is(b) {
		return errMessage
	}
	le := binary.LittleEndian
	*r = Request{What: What(le.Uint32(b[16:])), SnapLen: le.Uint32(b[20:]), Ring: le.Uint32(b[24:]), To: ib.GID(b[32:])}
	return nil
}

// An Answer is a NIC's.
type Answer struct {
	GID     ib.GID
	Program string // the name of the file that the process runs; at most maxProgram bytes
}

const maxProgram = 64

// Encode returns the message.
func (a *Answer) Encode() []byte {
	b := append([]byte(magic), a.GID[:]...)
	return append(b, a.Program[:min(len(a.Program), maxProgram)]...)
}

// Decode reads the message. What cannot be printed in the name is replaced.
func (a *Answer) Decode(b []byte) error {
	const head = len(magic) + 16
	if len(b) < head || len(b) > head+maxProgram || !Is(b) {
		return errMessage
	}
	*a = Answer{GID: ib.GID(b[len(magic):head]), Program: printable(b[head:])}
	return nil
}

// printable returns text that another process has sent, so that a terminal can show it.
func printable(b []byte) string {
	s := make([]byte, len(b))
	for i, c := range b {
		if c < ' ' || c > '~' {
			c = '?'
		}
		s[i] = c
	}
	return string(s)
}
