package mlx5emu

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// An eventFile is what the kernel's event files are to the client: each read returns one record. It is a pipe in packet mode,
// of which the client has the reading end. All methods are called with the device's mu held.
type eventFile struct {
	fd     int     // the writing end
	number int     // of the reading end, when it was passed to the client
	refs   int     // CQs that use it
	sent   []event // records that may not have been read yet, the oldest first
	queued []event // records for which the pipe has no room
}

// An event is a record, and the object that it is about.
type event struct {
	record []byte
	about  any
}

// newEventFile makes an event file, and passes its reading end to the client, from where nobody can take it back: so it comes last in
// what may fail.
func newEventFile(files FilePasser) (*eventFile, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_DIRECT); err != nil {
		return nil, fmt.Errorf("mlx5emu: event file: %w", err)
	}
	defer unix.Close(p[0])
	err := unix.SetNonblock(p[1], true)
	number := -1
	if err == nil {
		number, err = files.Pass(p[0])
	}
	if err != nil {
		unix.Close(p[1])
		return nil, fmt.Errorf("mlx5emu: event file: %w", err)
	}
	return &eventFile{fd: p[1], number: number}, nil
}

// deserted reports whether the client has closed its end.
func (e *eventFile) deserted() bool {
	fds := []unix.PollFd{{Fd: int32(e.fd)}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLERR != 0
}

// send adds a record. What the client does not read stays in a queue of ours once the pipe is full.
func (e *eventFile) send(record []byte, about any) {
	e.queued = append(e.queued, event{record, about})
	e.flush()
}

func (e *eventFile) flush() {
	for len(e.queued) > 0 {
		if _, err := unix.Write(e.fd, e.queued[0].record); err != nil {
			if err == unix.EPIPE {
				e.queued, e.sent = nil, nil
			}
			break
		}
		e.sent = append(e.sent, e.queued[0])
		e.queued = e.queued[1:]
	}
	if len(e.queued) > maxUnread {
		e.queued = e.queued[len(e.queued)-maxUnread:]
	}
	if len(e.sent) > maxUnread {
		e.sent = slices.Clone(e.sent[len(e.sent)-e.unread():])
	}
}

// unread is how many records are in the pipe.
func (e *eventFile) unread() int {
	n, err := unix.IoctlGetInt(e.fd, unix.TIOCINQ)
	if err != nil || len(e.sent) == 0 {
		return 0
	}
	return min(n/len(e.sent[0].record), len(e.sent))
}

// forget takes back what the client has not read about an object, and returns how many that were.
func (e *eventFile) forget(about any) (n int) {
	e.sent = slices.Clone(e.sent[len(e.sent)-e.unread():])
	is := func(v event) bool { return v.about == about }
	before := len(e.queued)
	e.queued = slices.DeleteFunc(e.queued, is)
	n = before - len(e.queued)
	if !slices.ContainsFunc(e.sent, is) {
		return n
	}
	// Records can be taken out of a pipe at its reading end only, and in order: so all are, and the others put back.
	r, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", e.fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return n
	}
	defer unix.Close(r)
	left := e.sent
	var taken []event
	buf := make([]byte, maxRecord)
	for {
		k, err := unix.Read(r, buf)
		if err != nil || k <= 0 {
			break
		}
		// The client may have read some meanwhile: those before it.
		for len(left) > 0 && string(left[0].record) != string(buf[:k]) {
			left = left[1:]
		}
		if len(left) == 0 {
			break
		}
		taken = append(taken, left[0])
		left = left[1:]
	}
	kept := slices.DeleteFunc(slices.Clone(taken), is)
	n += len(taken) - len(kept)
	e.sent = nil
	e.queued = append(kept, e.queued...)
	e.flush()
	return n
}

func (e *eventFile) close() { unix.Close(e.fd) }

const maxRecord = 16
