package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

// A client may have slots chunks of a file loaded at a time: while it reads one, the server fills the others.
const (
	chunkBytes   = 512 << 10
	slots        = 4
	stagingBytes = chunkBytes * slots
)

var (
	errChanged = errors.New("the file was changed while it was copied")
	errOrder   = errors.New("chunks are loaded in order, and the file is finished after the last")
)

// session is a file that a client copies, on the server's side. Safe for concurrent use; loads take turns.
type session struct {
	size    int64
	mode    fs.FileMode
	mtime   time.Time
	staging []byte // registered memory that the client reads

	mu   sync.Mutex
	f    *os.File
	next uint64 // chunk
	sum  hash.Hash
}

// openSession opens a regular file below root. The path cannot lead out of it, not by symbolic links either.
func openSession(root *os.Root, path string, staging []byte) (*session, error) {
	info, err := root.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() { // looked at before opening: to open a pipe is to wait for its writer
		return nil, &fs.PathError{Op: "copy", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := root.Open(path)
	if err != nil {
		return nil, err
	}
	if info, err = f.Stat(); err != nil {
		f.Close()
		return nil, err
	}
	return &session{
		size: info.Size(), mode: info.Mode().Perm(), mtime: info.ModTime(), staging: staging, f: f, sum: sha256.New(),
	}, nil
}

// chunks is how many chunks a file of size bytes has; an empty one has none.
func chunks(size int64) uint64 { return uint64((size + chunkBytes - 1) / chunkBytes) }

// load reads chunk k, which must be the next one, into its slot, and returns its length. The client has read what the
// slot held before.
func (s *session) load(k uint64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil {
		return 0, fs.ErrClosed
	}
	if k != s.next || k >= chunks(s.size) {
		return 0, errOrder
	}
	slot := s.staging[k%slots*chunkBytes:][:min(chunkBytes, s.size-int64(k)*chunkBytes)]
	if n, err := io.ReadFull(s.f, slot); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return n, fmt.Errorf("%w: it ends at byte %d instead of %d", errChanged, int64(k)*chunkBytes+int64(n), s.size)
		}
		return n, err
	}
	s.sum.Write(slot)
	s.next++
	return len(slot), nil
}

// finish returns the SHA-256 of the file, all of whose chunks must have been loaded.
func (s *session) finish() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil {
		return nil, fs.ErrClosed
	}
	if s.next != chunks(s.size) {
		return nil, errOrder
	}
	info, err := s.f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != s.size || !info.ModTime().Equal(s.mtime) {
		return nil, errChanged
	}
	return s.sum.Sum(nil), nil
}

// close gives the file back. Closing twice is no error.
func (s *session) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil {
		return nil
	}
	err := s.f.Close()
	s.f = nil
	return err
}
