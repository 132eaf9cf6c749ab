package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// remoteFile is a file opened on a server.
type remoteFile interface {
	size() int64
	mode() fs.FileMode
	// load has the server put chunk k where it can be read, and returns its length.
	load(ctx context.Context, k uint64) (int, error)
	// fetch reads n bytes of chunk k one-sided. They are lent until the next fetch.
	fetch(ctx context.Context, k uint64, n int) ([]byte, error)
	// finish returns the server's SHA-256 of the file.
	finish(ctx context.Context) ([]byte, error)
}

var errSum = errors.New("SHA-256 of the copy is not that of the original")

// receive copies a remote file to the local path, and returns its SHA-256. The local file appears under its name only
// when it is complete and its checksum is right; whatever was there before is replaced then, and not earlier.
func receive(ctx context.Context, from remoteFile, local string) (sum []byte, err error) {
	if info, err := os.Stat(local); err == nil && info.IsDir() {
		return nil, &fs.PathError{Op: "create", Path: local, Err: errors.New("is a directory; name the file in it")}
	}
	// Of the original's permission bits it gets those that a new file may have here: the umask is ours.
	part := filepath.Join(filepath.Dir(local), "."+filepath.Base(local)+".part-"+rand.Text())
	tmp, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, from.mode())
	if err != nil {
		return nil, err
	}
	defer func() {
		tmp.Close() // twice if all went well; the second one does nothing
		if err != nil {
			os.Remove(part)
		}
	}()
	if sum, err = receiveTo(ctx, from, tmp); err != nil {
		return nil, err
	}
	if err := tmp.Close(); err != nil {
		return nil, err
	}
	return sum, os.Rename(part, local)
}

// receiveTo copies the file, with up to slots-1 chunks being loaded while one is read. The loads are made by one
// goroutine, in order; it runs ahead as far as there are free slots.
func receiveTo(ctx context.Context, from remoteFile, to *os.File) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	count := chunks(from.size())
	free := make(chan struct{}, slots) // a token a slot that may be filled
	for range slots {
		free <- struct{}{}
	}
	loaded := make(chan int, slots) // lengths, in order
	loaderDone := make(chan struct{})
	defer func() { cancel(nil); <-loaderDone }()
	go func() {
		defer close(loaderDone)
		defer close(loaded)
		for k := range count {
			select {
			case <-free:
			case <-ctx.Done():
				return
			}
			n, err := from.load(ctx, k)
			if err == nil && int64(n) != min(chunkBytes, from.size()-int64(k)*chunkBytes) {
				err = fmt.Errorf("chunk %d has %d bytes", k, n)
			}
			if err != nil {
				cancel(err)
				return
			}
			loaded <- n // has room for every slot
		}
	}()

	sum := sha256.New()
	for k := range count {
		n, ok := <-loaded
		if !ok {
			return nil, context.Cause(ctx)
		}
		data, err := from.fetch(ctx, k, n)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return nil, err
		}
		if _, err := to.Write(data); err != nil {
			return nil, err
		}
		sum.Write(data)
		free <- struct{}{}
	}
	theirs, err := from.finish(ctx)
	if err != nil {
		return nil, err
	}
	ours := sum.Sum(nil)
	if !bytes.Equal(ours, theirs) {
		return nil, fmt.Errorf("%w: %x and %x", errSum, ours, theirs)
	}
	return ours, nil
}
