package pcap

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

// Files is a capture that goes to files of a limited size, as tcpdump -C and -W have them: when one is full the next one begins,
// each with all its interfaces, and after the last the first is written over. It is for one goroutine at a time.
type Files struct {
	// Name of the file; "-": Out. With a limit, the number of the file follows the name.
	Name string
	// Size after which the next file begins, bytes; 0: there is only one. A file is larger by what was being written when it was
	// reached, and what Close adds.
	Size int64
	// Count is how many files there are; 0: as many as are needed. It needs Size.
	Count int
	// App is the program that makes the capture.
	App string
	// Out is written to instead of a file called "-".
	Out io.Writer

	file       *os.File
	buf        *bufio.Writer
	w          *Writer
	written    int64
	number     int
	interfaces []Interface
}

// Write implements io.Writer for the Writer of the present file.
func (f *Files) Write(b []byte) (int, error) {
	n, err := f.buf.Write(b)
	f.written += int64(n)
	return n, err
}

// Open begins the first file.
func (f *Files) Open() error { return f.next() }

// path of the present file: the number has as many digits as the last one's.
func (f *Files) path() string {
	switch {
	case f.Size == 0 || f.Count == 0 && f.number == 0:
		return f.Name
	case f.Count == 0:
		return f.Name + strconv.Itoa(f.number)
	}
	return fmt.Sprintf("%s%0*d", f.Name, len(strconv.Itoa(f.Count-1)), f.number)
}

func (f *Files) next() error {
	var out io.Writer
	if f.Name == "-" {
		out = f.Out
	} else {
		file, err := os.Create(f.path())
		if err != nil {
			return err
		}
		f.file, out = file, file
	}
	f.buf, f.written = bufio.NewWriterSize(out, 1<<16), 0
	var err error
	if f.w, err = NewWriter(f, f.App); err != nil {
		return err
	}
	for _, i := range f.interfaces {
		if _, err := f.w.AddInterface(i); err != nil {
			return err
		}
	}
	return nil
}

// AddInterface is Writer.AddInterface, for this file and those that follow.
func (f *Files) AddInterface(i Interface) (int, error) {
	f.interfaces = append(f.interfaces, i)
	return f.w.AddInterface(i)
}

// Packet is Writer.Packet.
func (f *Files) Packet(k *Packet) error {
	if f.Size > 0 && f.written >= f.Size {
		if err := f.finish(); err != nil {
			return err
		}
		if f.number++; f.number == f.Count {
			f.number = 0
		}
		if err := f.next(); err != nil {
			return err
		}
	}
	return f.w.Packet(k)
}

// Statistics is Writer.Statistics.
func (f *Files) Statistics(i int, t time.Time, received, lost uint64) error {
	return f.w.Statistics(i, t, received, lost)
}

// Flush writes what is held back.
func (f *Files) Flush() error { return f.buf.Flush() }

func (f *Files) finish() error {
	err := f.buf.Flush()
	if f.file != nil {
		if e := f.file.Close(); err == nil {
			err = e
		}
		f.file = nil
	}
	return err
}

// Close ends the last file.
func (f *Files) Close() error { return f.finish() }
