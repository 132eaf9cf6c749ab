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
	wr  buffer // as write() takes it, which is less work for the kernel
	io  buffer // as the ioctl takes it; empty if this kernel's cannot
	all buffer // the cell that both are in

	refused bool // write() was: this process has changed its credentials. Of Run's caller alone
}

// A cell holds one prepared command in both forms; writeSize of its bytes are the largest that write() takes with its
// response, the others an ioctl with three attributes, 24 bytes of request and 4 of response.
const (
	cellSize  = 192
	writeSize = 64
)

// Prepare builds a command of the write() interface. Its responses are not wanted. Free gives its memory back.
func (f *File) Prepare(op string, w *WriteCmd) (*Prepared, error) {
	cell, err := f.cell()
	if err != nil {
		return nil, f.errorf(op, fmt.Errorf("memory for a prepared command: %w", err))
	}
	p := &Prepared{f: f, op: op, all: cell}
	b := cell.part(0, writeSize)
	n, _, _, err := b.legacy(w)
	if err == nil {
		p.wr = b.part(0, n)
		if !f.legacy.Load() {
			p.io = cell.part(writeSize, cellSize-writeSize)
			_, err = p.io.marshal(f.driver, abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_INVOKE_WRITE, w.attrs(nil))
		}
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
		p.f.cells = append(p.f.cells, p.all)
	}
	p.f.mu.Unlock()
}

// Run runs the command. One goroutine at a time may call it, and none when what it is about, or the File, is being closed.
// What the kernel does with the queue at once, it does meanwhile, some microseconds for each message; this thread's processor
// does nothing else until then, and a garbage collection that wants to stop the world waits for it.
func (p *Prepared) Run() error {
	if p.refused {
		return p.ioctl()
	}
	for {
		switch n, errno := p.f.k.Ring(p.wr.mem); {
		case errno == unix.EINTR:
		case errno == unix.EACCES && len(p.io.mem) > 0:
			p.refused = true
			return p.ioctl()
		case errno != 0:
			return writeError(p.f.device, p.op, errno)
		case n != len(p.wr.mem):
			return p.f.errorf(p.op, shortWrite(n, len(p.wr.mem)))
		default:
			return nil
		}
	}
}

// ioctl is Run for a process from which the kernel takes no write(): it does so from none that has other credentials than it
// had when it opened the device, for what it writes may come from a program that ran under its name before.
func (p *Prepared) ioctl() error {
	for {
		switch errno := p.f.k.Ioctl(p.io.mem, p.io.addr); errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return &CmdError{Device: p.f.device, Op: p.op, Errno: errno}
		}
	}
}
