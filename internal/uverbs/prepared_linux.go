package uverbs

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// A Prepared is a command that is built once and run often: running it takes no lock and allocates nothing. It is how a
// driver without doorbell registers is told to look at a queue.
type Prepared struct {
	f   *File
	op  string
	buf buffer
	n   int // length for write(); 0: it is an ioctl
}

// cellSize holds the largest prepared command: an ioctl with three attributes, 24 bytes of request and 4 of response.
const cellSize = 128

// Prepare builds a command of the write() interface. Its responses are not wanted. Free gives its memory back.
func (f *File) Prepare(op string, w *WriteCmd) (*Prepared, error) {
	b, err := f.cell()
	if err != nil {
		return nil, f.errorf(op, fmt.Errorf("memory for a prepared command: %w", err))
	}
	p := &Prepared{f: f, op: op, buf: b}
	if f.legacy.Load() {
		p.n, _, _, err = b.legacy(w)
	} else {
		_, err = b.marshal(f.driver, abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_INVOKE_WRITE, w.attrs(nil))
	}
	if err != nil {
		p.Free()
		return nil, f.errorf(op, err)
	}
	return p, nil
}

// cell returns cellSize bytes outside of the Go heap.
func (f *File) cell() (buffer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.cells) == 0 {
		const chunk = 64 << 10
		c, err := newBuffer(chunk)
		if err != nil {
			return buffer{}, err
		}
		f.chunks = append(f.chunks, c)
		for at := 0; at+cellSize <= chunk; at += cellSize {
			f.cells = append(f.cells, c.part(at, cellSize))
		}
	}
	last := len(f.cells) - 1
	b := f.cells[last]
	f.cells = f.cells[:last]
	return b, nil
}

// Free gives the command's memory back. Nobody may run it any more. It may be called on nil.
func (p *Prepared) Free() {
	if p == nil {
		return
	}
	p.f.mu.Lock()
	if p.f.chunks != nil { // else the file is closed, and all memory gone
		p.f.cells = append(p.f.cells, p.buf)
	}
	p.f.mu.Unlock()
}

// Run runs the command. One goroutine at a time may call it, and none when what it is about, or the File, is being closed.
// It may block for as long as the kernel works on the queue; other goroutines run meanwhile.
func (p *Prepared) Run() error {
	if p.n > 0 {
		return p.write()
	}
	for {
		switch errno := p.f.k.Ioctl(p.buf.mem, p.buf.addr); errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return &CmdError{Device: p.f.device, Op: p.op, Errno: errno}
		}
	}
}

func (p *Prepared) write() error {
	for {
		switch _, errno := p.f.k.Write(p.buf.mem[:p.n]); errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return writeError(p.f.device, p.op, errno)
		}
	}
}
