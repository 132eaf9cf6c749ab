package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// A kind says what a frame means. Host and machine, and clients and host, speak the same frames.
type kind uint8

const (
	kindReady    kind = iota + 1 // from the machine: it is set up; a readyReport
	kindFailed                   // from the machine: it could not be set up; why
	kindExec                     // to the machine: start a command; an execRequest
	kindStdin                    // to the machine: input of a command, empty at its end; wait for kindTaken before the next
	kindTaken                    // from the machine: the input was handed on
	kindStdout                   // from the machine
	kindStderr                   // from the machine
	kindStatus                   // from the machine, and a command's last frame: an exitStatus
	kindSignal                   // to the machine: one byte, the number of a signal for the command's process group
	kindKill                     // to the machine: end the command and all that it has started
	kindPowerOff                 // to the machine
	kindEnd                      // no kind: the first number that is free
)

// maxPayload bounds what a frame makes its reader allocate. Linux limits arguments and environment to about 2 MiB by
// default; output is sent in far smaller pieces.
const maxPayload = 8 << 20

// frameHeader is the length of what precedes a payload: its length (u32), kind (u8) and id (u32), little-endian.
const frameHeader = 9

// A frame is one message. Frames of several commands, told apart by id, share a connection.
type frame struct {
	kind    kind
	id      uint32
	payload []byte
}

var errBadFrame = errors.New("malformed frame")

// appendFrame appends the encoding of f to b.
func appendFrame(b []byte, f frame) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.payload)))
	b = append(b, byte(f.kind))
	b = binary.LittleEndian.AppendUint32(b, f.id)
	return append(b, f.payload...)
}

// readFrame reads one frame. At the end of the stream it returns io.EOF, within a frame io.ErrUnexpectedEOF.
func readFrame(r io.Reader) (frame, error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return frame{}, err
	}
	n := binary.LittleEndian.Uint32(h[:])
	f := frame{kind: kind(h[4]), id: binary.LittleEndian.Uint32(h[5:])}
	if n > maxPayload || f.kind == 0 || f.kind >= kindEnd {
		return frame{}, fmt.Errorf("%w: kind %d with %d bytes", errBadFrame, f.kind, n)
	}
	f.payload = make([]byte, n)
	if _, err := io.ReadFull(r, f.payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	return f, nil
}

// A frameWriter sends frames, each in one Write. It is safe for concurrent use.
type frameWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

func (w *frameWriter) send(k kind, id uint32, payload []byte) error {
	if len(payload) > maxPayload {
		return fmt.Errorf("%w: %d bytes are more than fit", errBadFrame, len(payload))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf = appendFrame(w.buf[:0], frame{k, id, payload})
	_, err := w.w.Write(w.buf)
	if cap(w.buf) > 1<<20 {
		w.buf = nil
	}
	return err
}

// A stream is an io.Writer that sends what is written as frames of one kind and id.
type stream struct {
	w  *frameWriter
	k  kind
	id uint32
}

func (s *stream) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		piece := p[n:min(n+32<<10, len(p))]
		if err := s.w.send(s.k, s.id, piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return len(p), nil
}
